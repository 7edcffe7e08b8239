"""Parts that recipes share: their arguments, the folder of a run, small models from scratch, and scores."""
