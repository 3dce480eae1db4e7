"""Text in and text out: tokenizers, prompts, sampling, detokenisation, and the loop that writes. Imports no torch."""
