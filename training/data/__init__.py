"""From prompts to pair tables and caches."""
