"""Time: how much of what the masks save in arithmetic is saved on the clock. The one room that measures what the others do."""
