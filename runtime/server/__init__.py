"""`kvq serve`: an OpenAI-compatible HTTP server over one model; needs the extra ``server``."""
