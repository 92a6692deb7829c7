"""Tools that need a model or data: scoring, recalibrating, comparing and sweeping."""
