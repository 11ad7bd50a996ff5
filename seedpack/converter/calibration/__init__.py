"""What a model's layers are fed: text for it to read, and the Hessians E[x·xᵀ] of its layers' inputs."""
