"""The OpenAI-compatible HTTP door. A client of the gRPC service; knows nothing about Ray."""
