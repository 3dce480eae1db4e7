"""The model families that come with dinoexport, one package each."""
