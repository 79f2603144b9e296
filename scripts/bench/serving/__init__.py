"""The HTTP server under load, beside an offline run and beside vLLM's server."""
