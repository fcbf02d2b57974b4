//! Imports between the files of a crate.
//!
//! A file imports another one by a path that starts with `crate`, `super`, `self` or the name of a
//! submodule. A name that a file re-exports belongs to the file that it comes from. A file may import its
//! own submodules, which are parts of it; all other imports must not form a cycle.

use std::collections::{BTreeMap, BTreeSet};

use crate::CRATES;
use crate::sources::{Source, sources};

/// A path of names from the root of the crate.
type ModulePath = Vec<String>;

/// The modules of a crate that are files.
struct CrateModules {
    /// Code of each file.
    files: BTreeMap<ModulePath, String>,
    /// The path that each re-exported name stands for.
    reexports: BTreeMap<ModulePath, ModulePath>,
}

impl CrateModules {
    fn new(files: BTreeMap<ModulePath, String>) -> CrateModules {
        let mut modules = CrateModules {
            files,
            reexports: BTreeMap::new(),
        };
        let mut reexports = BTreeMap::new();
        for file in modules.files.keys() {
            for (is_public, path) in modules.use_paths(file) {
                if let (true, Some(name)) = (is_public, path.last()) {
                    let exported = [file.as_slice(), std::slice::from_ref(name)].concat();
                    reexports.insert(exported, path);
                }
            }
        }
        modules.reexports = reexports;
        modules
    }

    /// Resolves a path that is written in `file`; `None` for a path into another crate.
    fn resolve(&self, file: &[String], written: &str) -> Option<ModulePath> {
        let mut names: Vec<&str> = written.split("::").map(str::trim).collect();
        let mut base = match *names.first()? {
            "crate" => Vec::new(),
            "self" | "super" => file.to_vec(),
            name => {
                let child = [file, &[name.to_owned()]].concat();
                if !self.files.contains_key(&child) {
                    return None;
                }
                file.to_vec()
            }
        };
        while names.first() == Some(&"super") {
            base.pop();
            names.remove(0);
        }
        if ["crate", "self"].contains(names.first()?) {
            names.remove(0);
        }
        base.extend(names.into_iter().map(str::to_owned));
        Some(base)
    }

    /// Every path of the `use` declarations of a file, and whether it is re-exported.
    fn use_paths(&self, file: &[String]) -> Vec<(bool, ModulePath)> {
        let code = &self.files[file];
        let mut paths = Vec::new();
        for (at, _) in code.match_indices("use ") {
            let before = code[..at].rsplit(['\n', ';', '}']).next().unwrap().trim();
            let is_public = before.starts_with("pub");
            if !(before.is_empty() || is_public) {
                continue;
            }
            let declaration = code[at + 4..].split(';').next().unwrap();
            for path in expand(declaration) {
                let path = path.split(" as ").next().unwrap();
                paths.extend(self.resolve(file, path).map(|path| (is_public, path)));
            }
        }
        paths
    }

    /// Every other path of a file that has at least two names.
    fn inline_paths(&self, file: &[String]) -> Vec<ModulePath> {
        let code = &self.files[file];
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let words = code.split(|c: char| !is_name(c) && c != ':');
        let paths = words.filter(|word| word.contains("::") && !word.starts_with(':'));
        paths
            .filter_map(|path| self.resolve(file, path.trim_end_matches(':')))
            .collect()
    }

    /// The file that a path belongs to.
    fn file_of(&self, path: &[String]) -> ModulePath {
        let mut path = path.to_vec();
        // The number of steps is limited because re-exports may be circular.
        for _ in 0..8 {
            let prefixes = (1..=path.len()).rev();
            let reexport = prefixes.filter(|n| !self.files.contains_key(&path[..*n]));
            let found = reexport.filter_map(|n| Some((n, self.reexports.get(&path[..n])?)));
            match found.into_iter().next() {
                Some((n, origin)) => path = [origin.as_slice(), &path[n..]].concat(),
                None => break,
            }
        }
        while !self.files.contains_key(&path) {
            path.pop();
        }
        path
    }

    /// The files that each file imports, except its own submodules and the root of the crate.
    fn imports(&self) -> BTreeMap<ModulePath, BTreeSet<ModulePath>> {
        let imports = self.files.keys().map(|file| {
            let used = self.use_paths(file).into_iter();
            let private = used.filter(|(is_public, _)| !is_public);
            let paths = private.map(|(_, path)| path).chain(self.inline_paths(file));
            let imported = paths.map(|path| self.file_of(&path));
            let imported = imported.filter(|other| !other.is_empty() && !other.starts_with(file));
            (file.clone(), imported.collect())
        });
        imports.collect()
    }
}

/// Expands `a::{b, c::d}` to `a::b` and `a::c::d`.
fn expand(declaration: &str) -> Vec<String> {
    let Some((head, rest)) = declaration.split_once('{') else {
        return vec![declaration.trim().to_owned()];
    };
    let (mut items, mut depth) = (vec![String::new()], 0);
    for c in rest.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(String::new()),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                items.last_mut().unwrap().push(c);
            }
        }
    }
    let items = items.iter().filter(|item| !item.trim().is_empty());
    items
        .flat_map(|item| expand(&format!("{}{}", head.trim(), item.trim())))
        .collect()
}

/// Path of a source file's module: `src/stages/report.rs` is `stages::report`.
fn module_path(source: &Source) -> ModulePath {
    let names = source.path.with_extension("");
    let names = names.iter().map(|name| name.to_string_lossy().into_owned());
    let names: Vec<String> = names.collect();
    let src = names.iter().rposition(|name| name == "src").unwrap();
    let path = names[src + 1..].to_vec();
    match path.last().map(String::as_str) {
        Some("lib" | "main") => Vec::new(),
        _ => path,
    }
}

/// Files that import one another in a circle. Files that import no remaining file, or that no remaining
/// file imports, are removed until none is left.
fn cycle(mut imports: BTreeMap<ModulePath, BTreeSet<ModulePath>>) -> Vec<String> {
    loop {
        let all: BTreeSet<ModulePath> = imports.keys().cloned().collect();
        let imported: BTreeSet<ModulePath> = imports.values().flatten().cloned().collect();
        imports.retain(|file, others| {
            others.retain(|other| all.contains(other));
            !others.is_empty() && imported.contains(file)
        });
        if imports.len() == all.len() {
            break;
        }
    }
    let lines = imports.iter().map(|(file, others)| {
        let others: Vec<String> = others.iter().map(|other| other.join("::")).collect();
        format!("{} imports {}", file.join("::"), others.join(", "))
    });
    lines.collect()
}

#[test]
fn imports_between_files_form_no_cycle() {
    let sources = sources();
    let mut cycles: Vec<String> = Vec::new();
    for (folder, name, _) in CRATES {
        let files = sources.iter().filter(|source| source.folder == folder);
        // A library's main.rs is a crate of its own.
        let files = files.filter(|s| folder != "src" || !s.path.ends_with("main.rs"));
        let files = files.map(|source| (module_path(source), source.code.clone()));
        let modules = CrateModules::new(files.collect());
        let lines = cycle(modules.imports());
        cycles.extend(lines.into_iter().map(|line| format!("{name}: {line}")));
    }
    assert!(cycles.is_empty(), "\n{}", cycles.join("\n"));
}

#[test]
fn a_cycle_through_a_reexport_is_found_and_submodules_are_exempt() {
    let file = |path: &str, code: &str| {
        let path = path.split("::").filter(|name| !name.is_empty());
        (path.map(str::to_owned).collect(), code.to_owned())
    };
    let modules = |b: &str| {
        CrateModules::new(BTreeMap::from([
            file("", "mod a; mod b;\npub use b::{B, inner::C as D};"),
            file("a", "use crate::{B, a::inner};\nuse std::fs;"),
            file("a::inner", "fn f() { super::g(crate::b::h()) }"),
            file("b", b),
        ]))
    };
    assert_eq!(cycle(modules("struct B;").imports()), Vec::<String>::new());
    assert_eq!(
        cycle(modules("use crate::a::A;").imports()),
        ["a imports b", "b imports a"]
    );
}
