"""Two models from the same noise, image by image: how much did a picture change, and is that much?"""
