"""The paper itself: geometry, routers, gates and the record of what they decided. Knows tensors, no model family."""
