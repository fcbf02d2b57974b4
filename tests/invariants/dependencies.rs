//! Dependencies between crates, and the libraries that each crate may use.

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

use crate::{CRATES, root};

/// Libraries that only some crates may name.
const NAMED_BY: [(&[&str], &[&str]); 8] = [
    (
        &["burn", "burn-core"],
        &["potstill-kernels", "potstill-model", "potstill-student"],
    ),
    (&["burn-cubecl", "cubecl"], &["potstill-kernels"]),
    (
        &[
            "arrow",
            "arrow-array",
            "arrow-buffer",
            "arrow-cast",
            "arrow-schema",
            "parquet",
            "datafusion",
            "object_store",
        ],
        &["potstill-datasets"],
    ),
    (
        &["reqwest", "hyper", "tokio", "ureq"],
        &["potstill-teacher"],
    ),
    (
        &["clap_complete", "ctrlc", "indicatif", "open"],
        &["potstill"],
    ),
    (&["anyhow", "clap"], &["potstill", "potstill-bench"]),
    // Settings of the run file, which are types of the crates that read them.
    (
        &["schemars"],
        &[
            "potstill",
            "potstill-datasets",
            "potstill-eval",
            "potstill-student",
            "potstill-teacher",
        ],
    ),
    // Run files, and the teacher's table of providers.
    (&["toml"], &["potstill", "potstill-teacher"]),
];

fn metadata() -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(root().join("Cargo.toml")).no_deps();
    command.exec().unwrap()
}

#[test]
fn edges_go_down_only() {
    let metadata = metadata();
    let packages = metadata.workspace_packages();
    assert_eq!(
        packages.len(),
        CRATES.len(),
        "CRATES does not list every crate"
    );
    for package in packages {
        let name = package.name.as_str();
        let (_, _, allowed) = CRATES.iter().find(|(_, n, _)| *n == name).unwrap();
        for dependency in &package.dependencies {
            let on = dependency.name.as_str();
            assert!(
                !on.starts_with("potstill") || allowed.contains(&on),
                "{name} uses {on}"
            );
        }
    }
}

#[test]
fn libraries_are_named_where_they_belong() {
    for package in metadata().workspace_packages() {
        // Dependencies of tests are exempt: tests have servers of their own.
        let named = package.dependencies.iter();
        for dependency in named.filter(|d| d.kind != DependencyKind::Development) {
            for (libraries, allowed) in NAMED_BY {
                let (name, on) = (package.name.as_str(), dependency.name.as_str());
                assert!(
                    !libraries.contains(&on) || allowed.contains(&name),
                    "{name} names {on}"
                );
            }
        }
    }
}
