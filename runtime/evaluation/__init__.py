"""Judge a cache by what the model answers: the same prompts with every arm, compared in pairs."""
