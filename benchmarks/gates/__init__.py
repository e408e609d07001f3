"""What must not get worse, and what is installed where nothing but the base is: the gate and the slim claim."""
