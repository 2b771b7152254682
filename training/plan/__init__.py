"""``opsin plan``: what a run will need, on paper: parameters, memory a GPU, operations, hours, storage."""
