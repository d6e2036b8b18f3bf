//! Has the pool's sources compiled with the model's primitives.

fn main() {
    println!("cargo::rustc-cfg=millpond_model");
    println!("cargo::rerun-if-changed=build.rs");
}
