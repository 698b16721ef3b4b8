"""Exercises made from the real code, planted bugs to find, and plots for lectures."""
