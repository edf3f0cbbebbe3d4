"""What is wrong with a student, a teacher and a data set before any step is paid for."""
