"""Text on its way in and out: decoding token by token, cells, chat templates."""
