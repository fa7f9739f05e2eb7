"""What training minimises: one file an objective, and the terms it may carry."""
