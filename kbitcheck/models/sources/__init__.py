"""Sources of models, one file each."""
