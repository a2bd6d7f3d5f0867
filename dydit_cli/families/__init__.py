"""Model families: one plug-in each behind one small interface, and the blocks they share."""
