"""Small ready tasks: model, data and metric."""
