"""An inspection to look at: shaded text for a terminal, an HTML report, a plot."""
