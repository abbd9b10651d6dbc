"""An inspection to look at: shaded text for a terminal, a page, a plot."""
