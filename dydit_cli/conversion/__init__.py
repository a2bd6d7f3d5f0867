"""From a static checkpoint to a dynamic model: importance, the order of units, routers, and the proof that nothing changed."""
