"""What a batch is and where it comes from: samples on disk or in object storage -> documents -> rows of tensors."""
