"""Text in, text out: corpus, training, generation, looking inside."""
