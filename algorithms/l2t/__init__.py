"""L2T: learn to predict the instruction too."""
