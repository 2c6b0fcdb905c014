"""What schemes share that read a model's answers: trigger sets, fingerprints of behavior, crafted inputs."""
