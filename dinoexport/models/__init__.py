"""The model families of dinoexport, one package each."""
