"""Writing: a checkpoint that is another one with scales added, without rewriting a weight."""
