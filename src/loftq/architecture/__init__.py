"""What a model's classes and configuration say of its weights, found on the meta device."""
