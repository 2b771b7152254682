"""The methods: one folder each, class form, functional form and card."""
