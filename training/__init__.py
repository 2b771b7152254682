"""The run: YAML -> objects -> Trainer.fit."""
