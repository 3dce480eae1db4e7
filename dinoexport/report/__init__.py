"""A verdict as HTML pages."""
