"""What is wrong with a photo set: copies, wrong labels, strangers, technical trouble. Nothing is changed."""
