"""One public function per operation, which chooses its implementation."""
