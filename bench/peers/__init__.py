"""Other runtimes, a module each with a dict ``ARMS``; none is imported before it is measured."""
