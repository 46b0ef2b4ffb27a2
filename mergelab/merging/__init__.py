"""From a recipe to a checked model folder."""
