"""Where weights come from: published files, local checkpoints, synthetic weights."""
