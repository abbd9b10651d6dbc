"""The SmolLM family's shapes, the recipe of the embedded default model, and the model itself."""
