"""Safety adapters for text-to-image models: load them, draw, and see how unsafe a picture is and where."""

__version__ = "0.1.0"
