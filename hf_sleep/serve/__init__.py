"""A server of memories, with the OpenAI API: `hf-sleep serve`, or `hf_sleep.serve.app.create_app` for your own."""
