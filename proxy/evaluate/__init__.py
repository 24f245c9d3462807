"""`nearhit eval`: labelled prompts through the code that serves, to tell how often it hits, and how often wrongly."""
