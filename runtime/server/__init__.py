"""An OpenAI-compatible HTTP server over the engine. Needs the extra ``serve``, so nothing is imported here."""
