//! Writes the CUDA C++ of all kernels as `FOLDER/sm_80/KERNEL.cu` and `FOLDER/sm_90/KERNEL.cu`, which
//! `scripts/nvrtc.py` compiles.

use std::path::PathBuf;
use std::{env, fs, io};

use potstill_kernels::cuda_sources;

fn main() -> io::Result<()> {
    let folder = env::args().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| io::Error::other("usage: cuda_sources FOLDER"))?;
    for compute_capability in [80, 90] {
        let folder = folder.join(format!("sm_{compute_capability}"));
        fs::create_dir_all(&folder)?;
        for source in cuda_sources(compute_capability).map_err(io::Error::other)? {
            fs::write(folder.join(format!("{}.cu", source.name)), source.text)?;
        }
    }
    Ok(())
}
