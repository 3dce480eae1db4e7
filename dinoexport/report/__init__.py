"""HTML reports: one for a bundle, one for a user's images that differ."""
