//! Generates the types of `shard.proto`. protox is a protobuf compiler in Rust, so no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=shard.proto");
    let files = protox::compile(["shard.proto"], ["."])?;
    prost_build::Config::new().compile_fds(files)?;
    Ok(())
}
