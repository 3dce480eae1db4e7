"""`dinoexport fit`: a classifier for a user's own classes, fitted on a bundle's features and appended to its graph."""
