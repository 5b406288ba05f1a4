"""An HTTP server that speaks OpenAI's language: requests are answered in batches, pictures come back as Markdown."""
