"""OpenAI's HTTP interface in front of a text model: /v1/completions, /v1/chat/completions, /v1/models."""
