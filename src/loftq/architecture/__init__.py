"""What a model's classes and configuration say about its weights, found on the meta device."""
