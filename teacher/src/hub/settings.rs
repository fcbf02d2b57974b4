//! Settings of the Hub's client, from the environment variables of huggingface_hub.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;

use super::HubError;
use crate::http::ApiKey;

/// Base URL of the Hub.
const ENDPOINT: &str = "https://huggingface.co";

/// Settings of the Hub's client.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Base URL of the Hub or of a mirror.
    pub endpoint: String,
    /// Token of an account, which is sent to the endpoint's host alone.
    pub token: Option<ApiKey>,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// Whether only the cache is used and nothing is sent.
    pub offline: bool,
    /// Largest number of attempts without progress.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles with each further one.
    pub pause: Duration,
    /// Longest pause that the Hub may ask for.
    pub longest_pause: Duration,
    /// Longest time without any data.
    pub idle: Duration,
}

impl HubSettings {
    /// Settings from `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and their
    /// older names, as huggingface_hub reads them. `variable` gives the value of an environment variable, and `home` is
    /// the user's folder. The file with the token is read if no variable gives the token.
    ///
    /// # Errors
    /// [`HubError::Settings`] when no folder for the cache is known.
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
        home: Option<PathBuf>,
    ) -> Result<HubSettings, HubError> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let is_true = |name: &str| {
            set(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&&*v.to_lowercase()))
        };
        let path = |name: &str| set(name).map(|value| in_home(&value, home.as_deref()));
        let folder = (path("HF_HOME"))
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(home.as_ref()?.join(".cache/huggingface")));
        let cache = (path("HF_HUB_CACHE"))
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(folder.as_ref()?.join("hub")));
        let Some(cache) = cache else {
            return Err(HubError::Settings(
                "there is no home folder for the cache of the Hugging Face Hub\nhint: set HF_HUB_CACHE to a folder"
                    .to_owned(),
            ));
        };
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(folder?.join("token")));
        let stored = || match is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            true => None,
            false => fs::read_to_string(token_file?).ok(),
        };
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(stored)
            .map(|token| token.trim().to_owned());
        Ok(HubSettings {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
            token: token.filter(|token| !token.is_empty()).map(ApiKey::new),
            cache,
            offline: is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE"),
            attempts: 6,
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(300),
            idle: Duration::from_secs(30),
        })
    }

    /// Parses and checks the base URL: https, or plain http without a token or to this host.
    pub(super) fn checked_endpoint(&self) -> Result<Url, HubError> {
        let refuse = |why: &str| {
            HubError::Settings(format!(
                "HF_ENDPOINT is `{}`, {why}",
                without_password(&self.endpoint)
            ))
        };
        let url = Url::parse(self.endpoint.trim_end_matches('/')).map_err(|_| {
            refuse("which is not a URL\nhint: write it as `https://host`, or unset it")
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse(
                "which contains a user name or a password\nhint: give the token through HF_TOKEN",
            ));
        }
        let is_loopback = match url.host_str() {
            Some(host) => matches!(host, "localhost" | "127.0.0.1" | "[::1]"),
            None => {
                return Err(refuse(
                    "which names no host\nhint: write it as `https://host`",
                ));
            }
        };
        match url.scheme() {
            "https" => Ok(url),
            "http" if is_loopback || self.token.is_none() => Ok(url),
            "http" => Err(refuse(
                "which is plain http, so the token could be read in transit\nhint: use https, or unset HF_TOKEN",
            )),
            _ => Err(refuse(
                "which is neither https nor http\nhint: write it as `https://host`",
            )),
        }
    }
}

/// Replaces `~/` at the beginning of a path by the user's folder.
fn in_home(path: &str, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    }
}

/// The text of a URL from behind its user name and password.
fn without_password(url: &str) -> &str {
    url.rsplit('@').next().unwrap_or(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> HubSettings {
        let variable = |name: &str| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        HubSettings::from_variables(variable, Some("/home/user".into())).unwrap()
    }

    #[test]
    fn folders_follow_the_variables_in_their_order() {
        let cache = |variables: &[(&str, &str)]| settings(variables).cache;
        let default = Path::new("/home/user/.cache/huggingface/hub");
        assert_eq!(cache(&[]), default);
        assert_eq!(cache(&[("HF_HUB_CACHE", " ")]), default);
        let xdg = ("XDG_CACHE_HOME", "/xdg");
        assert_eq!(cache(&[xdg]), Path::new("/xdg/huggingface/hub"));
        assert_eq!(
            cache(&[xdg, ("HF_HOME", "~/hf")]),
            Path::new("/home/user/hf/hub")
        );
        let old = ("HUGGINGFACE_HUB_CACHE", "/old");
        assert_eq!(cache(&[("HF_HOME", "/hf"), old]), Path::new("/old"));
        assert_eq!(cache(&[old, ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert!(HubSettings::from_variables(|_| None, None).is_err());
    }

    #[test]
    fn the_token_comes_from_a_variable_or_a_file_and_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        fs::write(&file, "hf_fromthefile\n").unwrap();
        let file = file.to_str().unwrap();
        let home = ("HF_HOME", folder.path().to_str().unwrap());
        let key = |token: &str| Some(ApiKey::new(token.to_owned()));
        assert_eq!(settings(&[home]).token, key("hf_fromthefile"));
        let path = ("HF_TOKEN_PATH", file);
        assert_eq!(settings(&[path]).token, key("hf_fromthefile"));
        assert_eq!(
            settings(&[path, ("HF_TOKEN", "hf_set")]).token,
            key("hf_set")
        );
        let off = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
        assert_eq!(settings(&[path, off]).token, None);
        assert!(!format!("{:?}", settings(&[path])).contains("hf_from"));
        assert!(settings(&[("HF_HUB_OFFLINE", "True")]).offline);
        assert!(!settings(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn a_token_is_not_sent_in_the_clear() {
        let checked = |endpoint, token| {
            settings(&[("HF_ENDPOINT", endpoint), ("HF_TOKEN", token)]).checked_endpoint()
        };
        assert!(checked("https://hub.example/prefix/", "hf_x").is_ok());
        assert!(checked("http://127.0.0.1:80", "hf_x").is_ok());
        assert!(checked("http://hub.example", "").is_ok());
        assert!(checked("http://hub.example", "hf_x").is_err());
        let error = checked("https://me:secret@hub.example", "").unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
        assert!(checked("hub.example", "").is_err());
    }
}
